"""Demo: a student and its teacher side by side in a browser. Only `app` needs Gradio."""
