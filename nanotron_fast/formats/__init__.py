"""What lies on disk: files, headers and configurations of each format."""
