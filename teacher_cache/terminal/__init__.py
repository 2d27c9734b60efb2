"""What both programs share of the terminal: options, config files, progress, stop signals."""
