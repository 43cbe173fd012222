"""Scripts for this repository: pictures, lists of files and settings, checks of prose."""
