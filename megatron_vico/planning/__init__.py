"""Plans a run without its cluster: the real step as any rank, layouts, schedules."""
