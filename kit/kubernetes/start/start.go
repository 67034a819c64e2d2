// Package start makes the programs' start cheap, of which a cluster has dozens: the initialisation of all their
// packages is half of what a short run of kubeadm takes, and every health check of a new container waits for it. It
// acts by being initialised before most packages, since its import path is an early one: Go initialises packages
// in the order of their paths where their imports leave a choice.
package start

import (
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"

	"k8s.io/kubectl/pkg/util/i18n"
)

func init() {
	deferCollection(32 << 20)
	// A package of kubectl asks for a translation while it is initialised. That packs, compresses and unpacks the
	// texts of a language: 15 ms, in programs also that have no use for them.
	_ = i18n.SetLoadTranslationsFunc(func() error {
		if !wantsTranslation(os.Args, os.Getenv) {
			return nil
		}
		return i18n.LoadTranslations("kubectl", nil)
	})
}

// deferCollection puts the first garbage collection off until the program has taken so many bytes. By default it
// comes at 4 MB and again whenever the heap has doubled: four times before main, to find that nearly all that
// the packages made is there to stay. From the first one on, everything is as GOGC and GOMEMLIMIT say.
func deferCollection(bytes int64) {
	limit := debug.SetMemoryLimit(-1)
	if limit <= bytes {
		return
	}
	debug.SetMemoryLimit(bytes)
	percent := debug.SetGCPercent(-1)
	runtime.SetFinalizer(new(collected), func(*collected) {
		debug.SetGCPercent(percent)
		debug.SetMemoryLimit(limit)
	})
}

// collected is what the first collection collects. Tiny objects without a pointer may share their memory with
// others that live on.
type collected struct{ _ *byte }

// wantsTranslation says whether the program is kubectl, and its user's language one other than that of the texts in
// its code.
func wantsTranslation(args []string, env func(string) string) bool {
	isKubectl := func(arg string) bool { return filepath.Base(arg) == "kubectl" }
	if !slices.ContainsFunc(args[:min(len(args), 2)], isKubectl) {
		return false
	}
	for _, name := range []string{"LC_ALL", "LC_MESSAGES", "LANG"} { // kubectl's own order
		if language := env(name); language != "" {
			return !strings.HasPrefix(language, "C") && !strings.HasPrefix(language, "en")
		}
	}
	return false
}
