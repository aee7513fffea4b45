"""The lab: one machine plays a whole fleet, on real parts."""
