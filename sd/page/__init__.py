"""The web page of `sd/gradio_demo.py`: what it can sample, what it draws, how its runs are stopped, and its layout."""
