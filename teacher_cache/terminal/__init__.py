"""Terminal code shared by both programs: options, config files, progress, stop signals."""
