"""What every daemon does alike: pull an artifact, prove that its loops move, write its log."""
