"""What the plug-in learns from live steps, and keeps."""
