"""The programs: each parses, calls the session, and turns errors into words and exit codes."""
