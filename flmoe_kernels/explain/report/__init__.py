"""The command `explain`: files in, findings, a page out."""
