"""Stage two: stream a cache, truncated to a lead span, into a student."""
