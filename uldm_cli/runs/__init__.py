"""What happens on disk: one file a verb. Nothing here prints."""
