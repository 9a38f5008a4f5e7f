"""Programs to read and to run: `quickstart.py`, then `flights.py`, the demo."""
