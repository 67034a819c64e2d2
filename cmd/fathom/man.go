package main

import (
	"fmt"
	"os"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
)

// man is part of `make install` and `make dist`.
func (a *app) man() *cobra.Command {
	return &cobra.Command{
		Use:    "man DIRECTORY",
		Short:  "Write the manual pages of all commands into a directory",
		Hidden: true,
		Args:   cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			root := cmd.Root()
			root.DisableAutoGenTag = true // the tag contains the build's date
			root.InitDefaultCompletionCmd()
			if err := os.MkdirAll(args[0], 0o755); err != nil {
				return err
			}
			// The library dates the pages by SOURCE_DATE_EPOCH.
			if err := doc.GenManTree(root, &doc.GenManHeader{Section: "1", Source: "fathom " + version, Manual: "Fathom"}, args[0]); err != nil {
				return fmt.Errorf("write the manual pages: %w", err)
			}
			return nil
		},
	}
}
