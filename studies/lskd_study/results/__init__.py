"""What finished runs left."""
