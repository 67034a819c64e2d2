package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/fathom-network/fathom/internal/lab"
)

func (a *app) save() *cobra.Command {
	var to string
	var secrets bool
	var every time.Duration
	var keep int
	cmd := &cobra.Command{
		Use:   "save [LAB]",
		Short: "Keep a lab as it stands, to begin with it again: all its objects, its nodes' disks, and the images that were loaded",
		Long: `Saves a lab, which goes on running. fathom up --from begins with what was saved; docs/save.md says what is in it.

Without --to it is kept on this machine, where root alone can read it, and fathom save ls lists it. --to writes a file
that can be sent to somebody: the values of Secrets and the keys of clusters are in it only with --with-secrets, and are
made anew otherwise.`,
		Example: `  fathom save
  fathom save --to lab.tar.zst
  fathom save --every 30s --keep 20
  fathom up --from @-5m`,
		Args: cobra.MaximumNArgs(1), PreRunE: requireRoot, ValidArgsFunction: a.completeFirstLab,
	}
	f := cmd.Flags()
	f.StringVar(&to, "to", "", "write it to a `file`, and keep nothing here")
	f.BoolVar(&secrets, "with-secrets", false, "have Secrets and the clusters' keys in the file")
	f.DurationVar(&every, "every", 0, "save it again and again, until interrupted, such as every 30s")
	f.IntVar(&keep, "keep", 20, "how many of those that --every saved are kept")
	cmd.MarkFlagsMutuallyExclusive("to", "every")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		switch {
		case secrets && to == "":
			return errors.New("--with-secrets is of --to: what is kept here has the secrets, and root alone can read it")
		case f.Changed("keep") && !f.Changed("every"):
			return errors.New("--keep is of --every: what is saved otherwise stays until `fathom save rm`")
		case f.Changed("every") && every < time.Second:
			return fmt.Errorf("--every %v: want a second at least", every)
		case keep < 1:
			return fmt.Errorf("--keep %d: want one at least", keep)
		}
		if _, err := os.Stat(filepath.Dir(to)); err != nil { // one that does not exist is mistyped
			return fmt.Errorf("--to %s: %w", to, err)
		}
		if info, err := os.Stat(to); err == nil && info.IsDir() {
			return fmt.Errorf("--to %s: it is a directory: name a file in it, such as %s", to, filepath.Join(to, "lab.tar.zst"))
		}
		l, err := a.openFirst(args)
		if err != nil {
			return err
		}
		o := lab.SaveOptions{Secrets: secrets, Version: version}
		if f.Changed("every") {
			return a.saveEvery(cmd.Context(), l, o, every, keep)
		}
		start := time.Now()
		if to == "" {
			s, err := l.SaveKept(cmd.Context(), o)
			if err != nil {
				return err
			}
			a.saved(s, time.Since(start))
			return nil
		}
		if err := l.Save(cmd.Context(), to, o); err != nil {
			return err
		}
		info, err := os.Stat(to)
		if err != nil {
			return err
		}
		fmt.Fprintf(a.out, "Saved lab %s to %s: %s, in %.1f s.\n", l.Name, to, sizeText(info.Size()), time.Since(start).Seconds())
		return nil
	}
	cmd.AddCommand(a.saveLs(), a.saveRm())
	return cmd
}

func (a *app) saved(s lab.Saved, took time.Duration) {
	fmt.Fprintf(a.out, "Saved %s: %s, in %.1f s.\n", s.Name, sizeText(s.Size), took.Seconds())
}

// saveEvery saves the lab until it is interrupted. A lab that cannot be saved now may be later: its API server may be starting.
func (a *app) saveEvery(ctx context.Context, l *lab.Lab, o lab.SaveOptions, every time.Duration, keep int) error {
	o.Periodic = true
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		start := time.Now()
		s, err := l.SaveKept(ctx, o)
		switch {
		case ctx.Err() != nil:
			return nil // it was asked to end
		case err == nil:
			a.saved(s, time.Since(start))
		default:
			if _, gone := a.openNamed(l.Name); gone != nil {
				return gone
			}
			fmt.Fprintln(a.err, "fathom:", err)
		}
		if err := lab.PruneSaved(a.paths, l.Name, keep); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// openFirst opens the lab that the first argument names, or --name.
func (a *app) openFirst(args []string) (*lab.Lab, error) {
	if len(args) > 0 {
		return a.openNamed(args[0])
	}
	return a.open()
}

func (a *app) completeFirstLab(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return a.completeLabs(cmd, args, "")
}

func (a *app) saveLs() *cobra.Command {
	var o output
	cmd := &cobra.Command{
		Use: "ls [LAB]", Short: "List what is kept, of all labs or of one", Args: cobra.MaximumNArgs(1), PreRunE: requireRoot,
		RunE: func(_ *cobra.Command, args []string) error {
			var of string
			if len(args) > 0 {
				of = args[0]
			}
			all, err := lab.Saves(a.paths, of)
			if err != nil {
				return err
			}
			type line struct {
				Name     string    `json:"name"`
				Taken    time.Time `json:"taken"`
				Size     int64     `json:"size"`
				Clusters []string  `json:"clusters"`
				Nodes    int       `json:"nodes"`
				Periodic bool      `json:"periodic"`
			}
			lines := []line{}
			var rows [][]string
			for _, s := range all {
				l := line{Name: s.Name, Taken: s.Taken, Size: s.Size, Periodic: s.Periodic}
				for _, c := range s.Lab.Clusters {
					l.Clusters = append(l.Clusters, c.Name)
					l.Nodes += len(c.Nodes)
				}
				periodic := ""
				if l.Periodic {
					periodic = "yes"
				}
				lines = append(lines, l)
				rows = append(rows, []string{l.Name, age(l.Taken), sizeText(l.Size), strings.Join(l.Clusters, ","), strconv.Itoa(l.Nodes), periodic})
			}
			if len(lines) == 0 && o.format == "" {
				fmt.Fprintln(a.err, "Nothing is kept. `fathom save` keeps a lab as it stands.")
				return nil
			}
			return o.print(a, lines, "NAME AGE SIZE CLUSTERS NODES PERIODIC", rows)
		},
	}
	o.register(cmd)
	return cmd
}

func (a *app) saveRm() *cobra.Command {
	return &cobra.Command{
		Use: "rm LAB@TIME…", Short: "Remove what is kept", Args: cobra.MinimumNArgs(1), PreRunE: requireRoot,
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			return a.savedNames(), cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(_ *cobra.Command, args []string) error {
			var all []lab.Saved
			for _, arg := range args {
				s, err := lab.FindSaved(a.paths, a.name, arg, time.Now())
				if err != nil {
					return err
				}
				all = append(all, s)
			}
			for _, s := range all {
				if err := lab.RemoveSaved(a.paths, s); err != nil {
					return err
				}
				fmt.Fprintf(a.out, "Removed %s.\n", s.Name)
			}
			return nil
		},
	}
}

func (a *app) savedNames() []string {
	all, _ := lab.Saves(a.paths, "")
	var names []string
	for _, s := range all {
		names = append(names, s.Name)
	}
	return names
}

// findFrom finds what was saved: a file, or one of those that are kept here.
func (a *app) findFrom(from string) (lab.Saved, error) {
	_, err := os.Stat(from)
	if err == nil || !strings.Contains(from, "@") || strings.Contains(from, string(filepath.Separator)) {
		return lab.OpenSaved(from)
	}
	return lab.FindSaved(a.paths, a.name, from, time.Now())
}

// upFrom begins with what was saved.
func (a *app) upFrom(ctx context.Context, s lab.Saved, o lab.RestoreOptions, report lab.Report) (*lab.Lab, error) {
	if s.Name == "" {
		return lab.Restore(ctx, a.paths, s.Path, o, report)
	}
	o.HostPaths = true // it was this machine's
	if o.Name != s.Lab.Name {
		return lab.Restore(ctx, a.paths, s.Path, o, report)
	}
	// Back to what was. What is there now is kept, should it be wanted after all.
	if l, err := lab.Open(a.paths, s.Lab.Name); err == nil {
		now, err := l.SaveKept(ctx, lab.SaveOptions{Version: version})
		if err != nil {
			return nil, fmt.Errorf("%w\nWhat is there now cannot be kept, and so nothing was changed: `fathom down%s` removes it, and then the same command begins with %s", err, nameFlag(l.Name), s.Name)
		}
		fmt.Fprintf(a.err, "What is there now is kept as %s.\n", now.Name)
		o.Replace = true
	}
	return lab.Restore(ctx, a.paths, s.Path, o, report)
}

func (a *app) fork() *cobra.Command {
	var timings timings
	cmd := &cobra.Command{
		Use:   "fork [LAB]",
		Short: "Bring a lab up once more, as it stands, under another name",
		Long: `Saves a lab and brings it up under the name that --name gives it, with addresses and keys of its own. Both have the same
objects, go on side by side, and differ from then on. docs/save.md says what a fork has of the lab.`,
		Example: `  fathom fork
  fathom fork fathom --name try`,
		Args: cobra.MaximumNArgs(1), PreRunE: requireRoot, ValidArgsFunction: a.completeFirstLab,
	}
	timings.flag(cmd.Flags())
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		of, name := "fathom", a.name
		if len(args) > 0 {
			of = args[0]
		}
		l, err := a.openNamed(of)
		if err != nil {
			return err
		}
		if !cmd.Flags().Changed("name") {
			if name, err = lab.ForkName(a.paths, of); err != nil {
				return err
			}
		}
		return a.bringUp(cmd.Context(), name, "", timings, func(ctx context.Context, report lab.Report) (*lab.Lab, error) {
			return l.Fork(ctx, name, lab.SaveOptions{Version: version}, report)
		})
	}
	return cmd
}

// sizeText writes a size for people.
func sizeText(n int64) string {
	switch {
	case n < 1e6:
		return fmt.Sprintf("%.0fkB", float64(n)/1e3)
	case n < 1e9:
		return fmt.Sprintf("%.1fMB", float64(n)/1e6)
	}
	return fmt.Sprintf("%.1fGB", float64(n)/1e9)
}
