"""LMSI, TTRL and Intuitor; imported only for a ``--method`` that needs them."""
