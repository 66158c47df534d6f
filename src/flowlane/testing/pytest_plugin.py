"""The pytest plugin that flowlane installs (entry point ``pytest11``)."""
