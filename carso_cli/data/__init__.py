"""Images: loading, checking, subsets and batches."""
