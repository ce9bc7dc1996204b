"""What results files hold, and reading them. Needs no torch."""
