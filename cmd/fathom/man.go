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
			root.DisableAutoGenTag = true // a line with the date of the build
			root.InitDefaultCompletionCmd()
			if err := os.MkdirAll(args[0], 0o755); err != nil {
				return err
			}
			// The pages' date is that of SOURCE_DATE_EPOCH, which the library looks at.
			if err := doc.GenManTree(root, &doc.GenManHeader{Section: "1", Source: "fathom " + version, Manual: "Fathom"}, args[0]); err != nil {
				return fmt.Errorf("write the manual pages: %w", err)
			}
			return nil
		},
	}
}
