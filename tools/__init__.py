"""Scripts for this repository: pictures, the list of files, checks of prose and of commit subjects."""
