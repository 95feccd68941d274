"""From a softmax checkpoint to a linear student: opening models, checking what arrived, converting."""
