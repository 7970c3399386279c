"""What people do with an engine: images, folders and video of any size, and the Python API."""
