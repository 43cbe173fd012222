"""What a network and an endpoint are: their life cycle, their kernel objects, their peers.

Nothing here knows HTTP. Continue with `driver.py` (the calls that Docker makes), then `ports.py`
(the interfaces to kernel and engine).
"""
