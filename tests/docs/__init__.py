"""Tests of the README and docs/. A copy of the project deletes them together with docs/."""
