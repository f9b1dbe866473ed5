"""Plain data shared by every room: tasks, results, models. No I/O, no asyncio, no native code."""
