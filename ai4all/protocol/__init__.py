"""What a worker and a coordinator say to each other: messages, bytes, states, one session.

Nothing here but ``connection`` knows a socket, a clock or an event loop.
"""
