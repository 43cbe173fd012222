"""`python -m plugin.cli`: what the script on the host runs inside the plugin's root file system."""

from plugin.cli import main

main()
