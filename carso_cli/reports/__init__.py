"""Reports: tables and pages drawn from stored records; nothing here computes a result."""
