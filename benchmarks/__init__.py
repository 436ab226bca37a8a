"""Measured claims: quality, latency and memory of a candidate against its baseline, judged, recorded and reported."""
