"""Every pipeline that diffusers exports, classic and modular, with tiny components built in code, and what a policy can do with it."""
