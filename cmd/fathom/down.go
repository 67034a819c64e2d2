package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/fathom-network/fathom/internal/lab"
)

func (a *app) down() *cobra.Command {
	var all, purge bool
	cmd := &cobra.Command{
		Use:   "down",
		Short: "Take a lab down and leave nothing behind",
		Long: `Ends every process of a lab and removes its namespaces, devices, mounts, cgroups and files, and its contexts
from the kubeconfig. It works on any state that an interrupted command left. The images and templates in /var/cache/fathom,
which all labs share, stay unless --purge is given.`,
		Example: "  fathom down\n  fathom down --all --purge",
		Args:    cobra.NoArgs,
		PreRunE: requireRoot,
	}
	cmd.Flags().BoolVar(&all, "all", false, "take every lab down")
	cmd.Flags().BoolVar(&purge, "purge", false, "remove the prepared images and the templates as well, when no lab is left")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		names := []string{a.name}
		if all {
			var err error
			if names, err = lab.Names(a.paths); err != nil {
				return err
			}
		}
		for _, name := range names {
			start := time.Now()
			progress := newProgress(a.err)
			err := lab.Down(cmd.Context(), a.paths, name, progress.report)
			progress.close()
			if err != nil {
				return err
			}
			fmt.Fprintf(a.out, "Lab %s is gone, in %.1f s.\n", name, time.Since(start).Seconds())
		}
		if purge {
			return lab.Purge(a.paths)
		}
		return nil
	}
	return cmd
}
