package lab

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"github.com/fathom-network/fathom/internal/topology"
)

// Kubeconfig returns the kubeconfig of the lab: of one cluster, or of all if the name is empty.
func (l *Lab) Kubeconfig(cluster string) (*clientcmdapi.Config, error) {
	conf := clientcmdapi.NewConfig()
	for i := range l.Clusters {
		c := &l.Clusters[i]
		if cluster != "" && c.Name != cluster {
			continue
		}
		if err := l.addContext(conf, c); err != nil {
			return nil, err
		}
		if conf.CurrentContext == "" {
			conf.CurrentContext = l.Context(c)
		}
	}
	if len(conf.Contexts) == 0 {
		_, err := l.Cluster(cluster)
		return nil, err
	}
	return conf, nil
}

func (l *Lab) addContext(conf *clientcmdapi.Config, c *topology.Cluster) error {
	admin, err := clientcmd.LoadFromFile(l.AdminKubeconfig(c))
	if err != nil {
		return fmt.Errorf("read the credentials of cluster %s: %w", c.Name, err)
	}
	from := admin.Contexts[admin.CurrentContext]
	if from == nil || admin.Clusters[from.Cluster] == nil || admin.AuthInfos[from.AuthInfo] == nil {
		return fmt.Errorf("read the credentials of cluster %s: %s has no current context", c.Name, l.AdminKubeconfig(c))
	}
	name := l.Context(c)
	conf.Clusters[name] = admin.Clusters[from.Cluster]
	conf.AuthInfos[name] = admin.AuthInfos[from.AuthInfo]
	conf.Contexts[name] = &clientcmdapi.Context{Cluster: name, AuthInfo: name, Extensions: map[string]runtime.Object{
		labExtension: &runtime.Unknown{Raw: []byte(strconv.Quote(l.Name)), ContentType: runtime.ContentTypeJSON},
	}}
	// Where an entry was read from is not part of it.
	conf.Clusters[name].LocationOfOrigin, conf.AuthInfos[name].LocationOfOrigin = "", ""
	return nil
}

// UserKubeconfig is the file that contexts are merged into: the first of $KUBECONFIG, or ~/.kube/config.
func UserKubeconfig() string {
	for file := range strings.SplitSeq(os.Getenv("KUBECONFIG"), string(filepath.ListSeparator)) {
		if file != "" {
			return file
		}
	}
	return clientcmd.RecommendedHomeFile
}

// mergeKubeconfig puts the lab's contexts into the user's kubeconfig and makes the first the current one.
func (l *Lab) mergeKubeconfig() error {
	ours, err := l.Kubeconfig("")
	if err != nil {
		return err
	}
	return editKubeconfig(UserKubeconfig(), func(conf *clientcmdapi.Config) bool {
		removeContexts(conf, l.Name, ours)
		for name := range ours.Contexts {
			conf.Clusters[name], conf.AuthInfos[name], conf.Contexts[name] = ours.Clusters[name], ours.AuthInfos[name], ours.Contexts[name]
		}
		conf.CurrentContext = ours.CurrentContext
		return true
	})
}

// labExtension marks the contexts that are a lab's, so that `down` removes those and no others, even when
// it knows nothing of the lab but its name.
const labExtension = "fathom.network/lab"

// cleanKubeconfig takes the lab's contexts out of the user's kubeconfig.
func (l *Lab) cleanKubeconfig() error {
	if _, err := os.Stat(UserKubeconfig()); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return editKubeconfig(UserKubeconfig(), func(conf *clientcmdapi.Config) bool {
		return removeContexts(conf, l.Name, nil)
	})
}

// removeContexts removes the contexts that carry the mark of the lab, and says whether there were any.
func removeContexts(conf *clientcmdapi.Config, lab string, keep *clientcmdapi.Config) bool {
	changed := false
	for name, c := range conf.Contexts {
		if markOf(c) != lab || (keep != nil && keep.Contexts[name] != nil) {
			continue
		}
		delete(conf.Contexts, name)
		delete(conf.Clusters, name)
		delete(conf.AuthInfos, name)
		if conf.CurrentContext == name {
			conf.CurrentContext = ""
		}
		changed = true
	}
	return changed
}

func markOf(c *clientcmdapi.Context) string {
	if u, ok := c.Extensions[labExtension].(*runtime.Unknown); ok {
		if lab, err := strconv.Unquote(strings.TrimSpace(string(u.Raw))); err == nil {
			return lab
		}
	}
	return ""
}

// editKubeconfig changes a kubeconfig file in one step, keeping its mode and whatever else it holds.
func editKubeconfig(path string, edit func(*clientcmdapi.Config) bool) error {
	dir := filepath.Dir(path)
	// client-go locks a file beside the kubeconfig instead; a command that was killed would leave it, and
	// nobody could change the kubeconfig any more.
	unlock, err := lockDir(dir)
	if err != nil {
		return err
	}
	defer unlock()
	conf, err := clientcmd.LoadFromFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		conf = clientcmdapi.NewConfig()
	case err != nil:
		return fmt.Errorf("read the kubeconfig %s: %w", path, err)
	}
	if !edit(conf) {
		return nil
	}
	if len(conf.Contexts) == 0 && len(conf.Clusters) == 0 && len(conf.AuthInfos) == 0 {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		removeEmpty(dir)
		return nil
	}
	data, err := clientcmd.Write(*conf)
	if err != nil {
		return err
	}
	// A kubeconfig is often a symbolic link into a directory of settings, and stays one.
	if target, err := filepath.EvalSymlinks(path); err == nil {
		path = target
	}
	return writeFile(path, data, 0o600)
}
