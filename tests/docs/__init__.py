"""Tests of what the README and docs/ claim. A copy of the project deletes them with docs/."""
