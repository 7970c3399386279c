"""Share the work of a folder or a video between devices, processes and machines."""
