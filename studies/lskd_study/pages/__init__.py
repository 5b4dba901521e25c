"""What people read: pages, tables and verdicts."""
