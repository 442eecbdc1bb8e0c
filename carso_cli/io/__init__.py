"""Files: written whole, verified by checksum, downloaded, found."""
