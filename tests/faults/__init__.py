"""Kills, damaged files, full disks and hostile input."""
