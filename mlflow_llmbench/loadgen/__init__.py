"""Send requests to a server, stamp what arrives, and start servers."""
