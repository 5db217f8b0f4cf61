"""What the stages share, one topic per module. A stage never imports another stage."""
