"""Pictures as arrays: decoding, MATLAB's bicubic resizing, color conversion and PSNR."""
