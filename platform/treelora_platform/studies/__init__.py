"""Studies: methods x orders x seeds under equal conditions. `spec` says what is compared, `run` makes it."""
