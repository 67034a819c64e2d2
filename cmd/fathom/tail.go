package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"time"
)

// tailFile prints the last lines of a file, or all if lines is negative, and with follow also what is appended later.
func tailFile(ctx context.Context, w io.Writer, path string, lines int, follow bool) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("read the log: %w", err)
	}
	defer f.Close()
	if err := lastLines(f, lines); err != nil {
		return fmt.Errorf("read the log: %w", err)
	}
	for {
		if _, err := io.Copy(w, f); err != nil {
			return err
		}
		if !follow {
			return nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(200 * time.Millisecond):
		}
	}
}
