"""What a network and an endpoint are: their life, the kernel's part of them, and who the peers are.

Knows nothing of HTTP. Read on in `driver.py` (the calls Docker makes), then `ports.py` (the seams).
"""
