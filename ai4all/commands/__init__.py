"""What the commands do. ``ai4all.cli`` declares them, and imports each when it is called."""
