"""Modules that the stages share, one topic each. A stage never imports another stage."""
