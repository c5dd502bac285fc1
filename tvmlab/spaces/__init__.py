"""The schedules a search may pick from."""
