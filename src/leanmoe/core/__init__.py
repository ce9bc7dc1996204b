"""What any part of leanmoe may import: errors, files, provenance, progress, text, run folders."""
