"""Images, labels and masks for the three stages."""
