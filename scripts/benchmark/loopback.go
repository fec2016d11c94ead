// go-fuse's loopback file system with the settings of the example that go-fuse itself ships: Debian packages the
// library without it.
package main

import (
	"fmt"
	"os"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
)

func main() {
	if err := serve(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func serve(source, mountpoint string) error {
	root, err := fs.NewLoopbackRoot(source)
	if err != nil {
		return err
	}
	second := time.Second
	options := &fs.Options{AttrTimeout: &second, EntryTimeout: &second, NullPermissions: true}
	options.MountOptions.AllowOther = true
	options.MountOptions.Name = "loopback"
	options.MountOptions.Options = []string{"default_permissions", "fsname=" + source}
	server, err := fs.Mount(mountpoint, root, options)
	if err != nil {
		return err
	}
	server.Wait()
	return nil
}
