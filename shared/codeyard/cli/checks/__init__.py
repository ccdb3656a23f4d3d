"""What `codeyard doctor` looks at, one idea a module: each finds out, then decides in a plain function."""
