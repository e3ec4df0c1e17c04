"""Data: from files to token ids to padded batches."""
